"""Runs a script in CPU processes that share weights out among them, as it would run on GPUs.

accelerate launch --config_file FILE tests/sharded_launch.py SCRIPT [ARGUMENT ...]

accelerate reads its settings of FSDP and DeepSpeed only where the devices are no CPUs. Here it is
told that they are GPUs; all else is as it is: the same collectives, over gloo.
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
