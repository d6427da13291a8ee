"""A store under arbitrary commits, crashes, damage and repairs, against a model that remembers everything."""

import json
import shutil
import tempfile
import uuid
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_stage import commit, content_of, make_spec

from negfacediff_core.errors import StoreError
from negfacediff_core.store import faults, layout, records, shards
from negfacediff_core.store.layout import Unit, record_path
from negfacediff_core.store.repair import repair
from negfacediff_core.store.verify import Kind, check_units, survey

EXTENT = {"identities": 6, "replicates": 8}
UNITS = [Unit(0, 0), Unit(0, 1), Unit(1, 0), Unit(1, 1)]
STAGES = st.sampled_from(["samples", "aligned"])
NUMBER = st.integers(0, 10**6)


class Crash(BaseException):
    """The end of a process: nothing that it would run into handles this."""


class StoreMachine(RuleBasedStateMachine):
    """`files` holds what was committed, by stage and unit; a unit that is not in it is pending."""

    def place(self) -> str:
        self.folder = tempfile.mkdtemp()
        return self.folder

    @initialize()
    def prepare(self):
        self.store = self.place()
        samples = make_spec(self.store, **EXTENT, inputs={})
        aligned = make_spec(self.store, **EXTENT, name="aligned", inputs={"samples": samples.fingerprint})
        self.specs = {spec.name: spec for spec in (samples, aligned)}
        for spec in self.specs.values():
            shards.prepare(spec)
        self.files: dict[tuple[str, Unit], dict[str, bytes]] = {}

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @rule(stage=STAGES, unit=st.sampled_from(UNITS))
    def commit(self, stage, unit):
        spec = self.specs[stage]
        before = self.files.get((stage, unit))
        if before is None:
            self.remember(stage, unit, commit(spec, unit))
        elif (stage, unit) not in self.damaged():
            commit(spec, unit)
            assert {path: spec.location.read_bytes(path) for path in before} == before

    @rule(stage=STAGES, unit=st.sampled_from(UNITS), point=st.integers(0, 15))
    def crash(self, stage, unit, point):
        if (stage, unit) in self.files:
            return
        taken: list[str] = []

        def die(step):
            if len(taken) == point:
                raise Crash
            taken.append(step)

        faults.hook = die
        try:
            self.remember(stage, unit, commit(self.specs[stage], unit))
        except Crash:
            if records.has_record(self.specs[stage], unit):  # it died behind the last rename
                self.remember(stage, unit, records.read_record(self.specs[stage], unit))
        finally:
            faults.hook = None

    def remember(self, stage, unit, record):
        paths = [record_path(unit), *record.sha256]
        location = self.specs[stage].location
        self.files[stage, unit] = {path: location.read_bytes(path) for path in paths}

    @precondition(lambda self: self.files)
    @rule(which=NUMBER, place=NUMBER, bit=st.integers(0, 7))
    def flip_a_bit(self, which, place, bit):
        spec, path, data = self.some_file(which)
        if data:
            spot = place % len(data)
            flipped = bytes([data[spot] ^ 1 << bit])
            spec.location.write_atomic(path, data[:spot] + flipped + data[spot + 1 :])
            self.verify()

    @precondition(lambda self: self.files)
    @rule(which=NUMBER, length=NUMBER)
    def truncate(self, which, length):
        spec, path, data = self.some_file(which)
        spec.location.write_atomic(path, data[: length % (len(data) + 1)])
        self.verify()

    @precondition(lambda self: self.files)
    @rule(which=NUMBER)
    def delete(self, which):
        spec, path, _ = self.some_file(which)
        spec.location.remove(path)
        for stage, unit in list(self.files):
            if stage == spec.name and path == record_path(unit):
                del self.files[stage, unit]  # without its record a unit is pending, not damaged
        self.verify()

    def some_file(self, number):
        """A file of some committed unit that is there, with what it holds now."""
        there = [
            (self.specs[stage], path)
            for (stage, _), files in sorted(self.files.items())
            for path in files
            if self.specs[stage].location.exists(path)
        ]
        spec, path = there[number % len(there)]
        return spec, path, spec.location.read_bytes(path)

    @rule()
    def reopen(self):
        for name, spec in self.specs.items():
            read = layout.read_spec(self.store, name, spec.fingerprint)
            shards.prepare(spec)
            assert replace(read, grid=spec.grid) == spec

    @rule()
    def verify(self):
        found = self.findings()
        assert {finding.kind for finding in found} <= {Kind.UNIT}
        assert {(finding.stage.split("/")[0], finding.unit) for finding in found} == self.damaged()

    @rule()
    def repair(self):
        damaged = self.damaged()
        repair(self.store, self.findings())
        for stage, unit in damaged:
            self.files.pop((stage, unit), None)
            if stage == "samples":
                self.files.pop(("aligned", unit), None)
        self.verify()

    def findings(self):
        found = survey(self.store)
        return [*found.findings, *check_units(found.units, workers=1)]

    def damaged(self):
        """Committed units of which a file is no longer what it was; of a record counts what it says."""
        return {
            (stage, unit)
            for (stage, unit), files in self.files.items()
            if not all(self.intact(stage, path, data) for path, data in files.items())
        }

    def intact(self, stage, path, data):
        location = self.specs[stage].location
        now = location.read_bytes(path) if location.exists(path) else None
        if now == data or now is None or not path.startswith("done/"):
            return now == data
        try:
            return json.loads(now) == json.loads(data)
        except ValueError:
            return False

    @rule(stage=STAGES, unit=st.sampled_from(UNITS))
    def read(self, stage, unit):
        spec = self.specs[stage]
        if (stage, unit) in self.files and (stage, unit) not in self.damaged():
            arrays, rows = content_of(spec, unit)
            read = shards.read_arrays(spec, unit)
            assert all(np.array_equal(read[name], values) for name, values in arrays.items())
            assert shards.read_rows(spec, unit).equals(rows)
            return
        with pytest.raises(StoreError):  # not committed, or not what was
            shards.read_arrays(spec, unit)
            shards.read_rows(spec, unit)

    @invariant()
    def committed_and_pending_are_all_there_is(self):
        for name, spec in getattr(self, "specs", {}).items():
            committed, pending = records.committed(spec), records.pending(spec)
            assert sorted(committed + pending) == UNITS
            assert committed == sorted(unit for stage, unit in self.files if stage == name)


class RemoteMachine(StoreMachine):
    """The same in a place without folders, temporary files and locks."""

    def place(self) -> str:
        return f"memory://machine-{uuid.uuid4().hex}"


StoreMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
RemoteMachine.TestCase.settings = settings(max_examples=7, stateful_step_count=20, deadline=None)
test_a_local_store = StoreMachine.TestCase
test_a_remote_store = RemoteMachine.TestCase
