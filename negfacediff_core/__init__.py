"""Synthetic face-recognition training sets from identity-conditioned diffusion with negative contexts."""

import os

# Unless told otherwise before it is first imported, onnxruntime reports to its maker and leaves an id of the
# machine in the home. What a user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
