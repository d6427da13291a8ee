"""Every error that the project raises on purpose. The command line shows them without a traceback."""


class NegFaceDiffError(Exception):
    """Something a user can mend: the message says what was wrong, where, and what to do."""


class ConfigError(NegFaceDiffError):
    """An unknown, mistyped or impossible setting."""


class WeightsError(NegFaceDiffError):
    """Weights that are missing, corrupt, of another architecture, or not what their hash says."""


class ContextsError(NegFaceDiffError):
    """Contexts or negatives that cannot be used: NaN, zero norm, wrong width, duplicates, bad indices."""


class StoreError(NegFaceDiffError):
    """A store that cannot be read or written: read-only, full, damaged, or of a newer schema."""


class BuildError(NegFaceDiffError):
    """A build that could not finish: the message lists the units that failed and where their logs are."""
