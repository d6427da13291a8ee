"""Every error that the project raises on purpose. The command line shows them without a traceback."""


class NegFaceDiffError(Exception):
    """Something a user can mend: the message says what was wrong, where, and what to do."""


class ConfigError(NegFaceDiffError):
    """An unknown, mistyped or impossible setting."""


class WorkerError(ConfigError):
    """A worker, or a cluster of them, on which no unit of a build can run."""


class WeightsError(NegFaceDiffError):
    """Weights that are missing, corrupt, of another architecture, or not what their hash says."""


class ContextsError(NegFaceDiffError):
    """Contexts or negatives that cannot be used: NaN, zero norm, wrong width, duplicates, bad indices."""


class StoreError(NegFaceDiffError):
    """A store that cannot be read or written: read-only, full, damaged, or of a newer schema."""


class DamagedError(StoreError):
    """A file of a store that was read, and is not what was written there."""


class PlaceError(StoreError):
    """A store whose disk is full, read-only or gone: no other unit could be written there either."""


class BuildError(NegFaceDiffError):
    """A build that could not finish: the message lists the units that failed and where their logs are."""


class StoppedError(NegFaceDiffError):
    """Work that was ended because nobody waits for it any more, as a build was cancelled."""
