"""The embedded default: a small written world, its gold scorer and its simulated labeler."""

from trl_instruct.tiny.gold import explain, gold_score
from trl_instruct.tiny.labeler import SimulatedLabeler
from trl_instruct.tiny.replies import flawed_reply, good_reply
from trl_instruct.tiny.splits import split
from trl_instruct.tiny.world import Task, sample_task
