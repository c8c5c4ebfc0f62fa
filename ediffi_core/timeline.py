"""Which expert denoises which step, as data and as a picture. (The lead wrote these two classes so that the nodes import; the
picture is being drawn by the module's owner. Signatures: Timeline(experts, sigmas, range).)"""

from dataclasses import dataclass

from .intervals import NoiseInterval
from .router import ExpertRouter


@dataclass(frozen=True)
class Band:
    name: str
    interval: NoiseInterval
    cfg: float | None = None


@dataclass(frozen=True)
class Timeline:
    experts: tuple[Band, ...]
    sigmas: tuple[float, ...]
    range: tuple[float, float]  # lowest and highest sigma of the model

    @property
    def plan(self) -> list[int]:
        router = ExpertRouter([band.interval for band in self.experts])
        return [router.expert(sigma) for sigma in self.sigmas[:-1]]

    def as_dict(self) -> dict:
        def finite(value):
            return None if value == float("inf") else value

        experts = [
            {"name": b.name, "low": b.interval.low, "high": finite(b.interval.high), "cfg": b.cfg} for b in self.experts
        ]
        return {"sigmas": list(self.sigmas), "experts": experts, "plan": self.plan, "range": list(self.range)}
