"""Runs a script with weights sharded over CPU processes, as it would run on GPUs.

accelerate launch --config_file FILE tests/sharded_launch.py SCRIPT [ARGUMENT ...]

accelerate ignores its FSDP and DeepSpeed settings on CPU. Here it takes the CPUs for GPUs; all else
is unchanged: the same collectives, over gloo.
"""

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

begin = AcceleratorState.__init__


def initialised(self, *args, **kwargs):
    if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    begin(self, *args, **kwargs)


if __name__ == "__main__":
    AcceleratorState.__init__ = initialised
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as at the end of processes.py: gloo's threads may abort the interpreter's end
