"""examples/language_model.py with a pause before every step, so that tests can interrupt it where they want to.

Behind the first checkpoint of a tiny run pauses are long: a busy machine gets its signal across too.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import language_model
from lm.training import Training

advance = Training.advance


def advance_slowly(training):
    time.sleep(0.1 if training.step < 8 else 0.5)
    return advance(training)


Training.advance = advance_slowly
sys.exit(language_model.main())
