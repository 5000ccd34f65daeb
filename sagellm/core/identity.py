"""Names of the things that machines and drivers talk about. All are plain values on the wire."""

from typing import NewType

RequestId = NewType("RequestId", str)
InstanceId = NewType("InstanceId", str)
StepId = NewType("StepId", int)
TransferId = NewType("TransferId", str)
BlockId = NewType("BlockId", int)

CONTROL_PLANE = InstanceId("control-plane")
"""The control plane's own address, beside those of the instances."""
