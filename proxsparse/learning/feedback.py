"""Lambda without tuning: feedback that steers the share of 2:4 blocks along a schedule.

lambda1 has the unit 1 / |weight|, and what it achieves in a run depends on the learning rate, the number of steps and
how hard the loss pulls back. So 'auto' starts from each matrix's scale, looks at the share of its blocks that are 2:4
after every step, and raises or lowers its lambda towards the share wanted by then. Used by ``lambda_value='auto'``.
"""

import math
from dataclasses import dataclass, field

START = 3e-3  # lambda * rms at the first step: takes about 0.3 % of the rms off a block's smaller weights
REACHED_AT = 0.85  # of the run the target is wanted; the rest is for settling
# log lambda per unit of share: little in short runs, where each step moves the share far, more in long ones.
PROPORTIONAL, STEPS_A_UNIT = (8.0, 32.0), 3
INTEGRAL = 60.0  # log lambda per unit of share and of the run
RANGE = (1e-6, 30.0)  # of lambda * rms; above, every block is 2:4 after one step


@dataclass
class ShareController:
    """Relative lambda of one matrix.

    Attributes:
        target: share of 2:4 blocks wanted at the end.
        strictness: factor of all gains.
        integral: accumulated error, in units of share times run.
    """

    target: float
    integral: float = 0.0
    gain: float = PROPORTIONAL[0]
    error: float = field(default=0.0, repr=False)
    strictness: float = 1.0

    def wanted(self, progress: float) -> float:
        """Share wanted at this part of the run, in [0, 1]."""
        return self.target * min(1.0, progress / REACHED_AT)

    def strength(self) -> float:
        """lambda times the matrix's rms for the next step."""
        raised = math.log(START) + self.strictness * (self.gain * self.error + INTEGRAL * self.integral)
        return min(RANGE[1], max(RANGE[0], math.exp(min(50.0, raised))))

    def observe(self, share: float, step: int, max_steps: int) -> None:
        """Take in the share found after step ``step`` (counted from 1) of ``max_steps``."""
        self.gain = min(PROPORTIONAL[1], max(PROPORTIONAL[0], max_steps / STEPS_A_UNIT))
        self.error = self.wanted((step + 1) / max_steps) - share
        # No winding up: at the ends of the range the integral stands still.
        inside = RANGE[0] < self.strength() < RANGE[1]
        if inside or (self.error > 0) == (self.strength() <= RANGE[0]):
            self.integral += self.error / max_steps

    def state(self) -> list[float]:
        return [self.integral, self.gain, self.error]

    def restore(self, state: list[float]) -> None:
        self.integral, self.gain, self.error = state
