"""What every head of the decoder attends to: read while the model computes its own output, reduced row block by row block."""

from headwise.attention.observe import Observed, observe
from headwise.attention.proof import prove
from headwise.attention.table import ATTENTION, PART, merge, part_writer, to_table
from headwise.observation import Observation

__all__ = ["ATTENTION", "PART", "Observation", "Observed", "merge", "observe", "part_writer", "prove", "to_table"]
