"""The stages of a build, in order: each plans itself, and makes one unit at a time.

`plan_build` checks everything that can be checked, `run_unit` makes one unit wherever it is called.
"""

from negfacediff_core.stages.build import STAGES, Stage, describe_build, plan_build, run_unit

__all__ = ["STAGES", "Stage", "describe_build", "plan_build", "run_unit"]
