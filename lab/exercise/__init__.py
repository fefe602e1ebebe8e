"""The exercise: hand out, check, diagnose and grade a student's model.py and exercise/steps.py.

Open parts.py first: it says what each part asks for. Then checks.py: what is checked, and how a
mistake gets its name (the library is in *_mistakes.py, symptoms.py and options.py).
"""

from lab.exercise.checks import Result
from lab.exercise.grading import checks_hash, grade
from lab.exercise.handout import hand_out
from lab.exercise.parts import PARTS
from lab.exercise.processes import LOADING, Job, run_checks

__all__ = ["LOADING", "PARTS", "Job", "Result", "checks_hash", "grade", "hand_out", "run_checks"]
