"""The stages of a build, in order: each plans itself, and makes one unit at a time.

`build.plan_build` checks everything that can be checked, `build.run_unit` makes one unit wherever it is
called. Nothing is imported here: what only reads images, as an export's workers do, needs no torch.
"""
