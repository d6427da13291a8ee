"""What processes of the tests of remote stores do: a module of its own, quick to import for each of them."""

import os
import signal

from small_stage import commit, make_spec

from negfacediff_core.store import faults, leases, records, shards


def build_small(spec):
    """Make every pending unit of a small stage."""
    shards.prepare(spec)
    for unit in records.pending(spec):
        commit(spec, unit)


def build_in_process(store, environment, identities, kill_at, steps):
    """Make a small stage; die at step `kill_at`, or report the steps at the end."""
    os.environ.update(environment)
    leases.LEASE = 1.0
    taken = []

    def observe(step):
        if len(taken) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        taken.append(step)

    faults.hook = observe
    build_small(make_spec(store, identities=identities))
    steps.put(taken)


def make_in_process(store, environment, build):
    """Make the whole of a build, every stage."""
    from stage_builds import make  # all the stages, which the small processes do without

    os.environ.update(environment)
    leases.LEASE = 1.0
    make(build, store)
