"""What a run has read: kept in its checkpoints, compared on resume, and resumed source by source after a change."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prism_mcore.data.mixture import Mixture


@dataclass(frozen=True)
class Reading:
    """How far one source has been read: `Reading("corpus/math", "9f3c...", 0.3, key=1, read=4800)`.

    read: samples taken of it before the present mixture began; in a checkpoint's record, all of them.
    """

    name: str  # in the settings, for people: the same content may lie somewhere else the next time
    identity: str  # of its content
    weight: float
    key: int  # its number in shuffles, which stays with the source when others come or go
    read: int = 0


@dataclass(frozen=True)
class History:
    """The sources of the present mixture, when it began, and what was read before that.

    History((Reading("math", ..., key=1, read=840), Reading("new", ..., key=2)), 1200, (Reading("old", ..., key=0),))
    """

    sources: tuple[Reading, ...]
    first: int = 0  # the run's first sample of this mixture
    former: tuple[Reading, ...] = ()  # sources of earlier mixtures

    @staticmethod
    def new(names: Sequence[str], identities: Sequence[str], weights: Sequence[float]) -> "History":
        """At the start of a run."""
        sources = zip(names, identities, weights, strict=True)
        return History(tuple(Reading(*source, key) for key, source in enumerate(sources)))

    @property
    def mixture(self) -> Mixture:
        """Which source each sample of the run comes from, from `first` on."""
        return Mixture([s.weight for s in self.sources], self.first, [s.read for s in self.sources])

    def record(self, num_samples: int) -> dict[str, Any]:
        """For a checkpoint after so many samples of the run (JSON)."""
        taken = self.mixture.counts(num_samples).tolist()
        sources = [asdict(replace(s, read=n)) for s, n in zip(self.sources, taken, strict=True)]
        before = [s.read for s in self.sources]
        return {"first": self.first, "sources": sources, "before": before, "former": [asdict(s) for s in self.former]}

    def differences(self, record: dict[str, Any], setting: str) -> list[str]:
        """How these sources are not those of a checkpoint's record, in words; setting: the list of sources' name."""
        then = [Reading(**source) for source in record["sources"]]
        found = []
        for place, (was, now) in enumerate(zip(then, self.sources, strict=False)):
            if was.identity != now.identity:
                elsewhere = any(was.identity == other.identity for other in self.sources)
                what = (
                    f"it was {was.name}, which is in another place now"
                    if elsewhere
                    else f"{was.name} held other content"
                )
                found.append(f"{setting}[{place}] ({now.name}): {what}")
        for place, was in enumerate(then[len(self.sources) :], len(self.sources)):
            found.append(f"{setting}[{place}] ({was.name}) is gone")
        for place, now in enumerate(self.sources[len(then) :], len(then)):
            found.append(f"{setting}[{place}] ({now.name}) is new")
        if not found and _shares(then) != _shares(self.sources):
            listed = zip(then, self.sources, _shares(then), _shares(self.sources), strict=True)
            found = [
                f"{setting}[{place}] ({now.name}): its share was {before}, it is {after}"
                for place, (_, now, before, after) in enumerate(listed)
                if before != after
            ]
        return found

    def resumed(self, record: dict[str, Any]) -> "History":
        """This history where nothing has changed: the mixture continues where the record left it."""
        sources = [
            replace(now, key=was["key"], read=before)
            for now, was, before in zip(self.sources, record["sources"], record["before"], strict=True)
        ]
        return History(tuple(sources), record["first"], tuple(Reading(**source) for source in record["former"]))

    def changed(self, record: dict[str, Any], num_samples: int) -> "History":
        """A new mixture of these sources from sample num_samples on.

        A source that was read before, wherever it stood, keeps its order and resumes after its last sample.
        """
        known = [Reading(**source) for source in (*record["sources"], *record["former"])]
        fresh = max(source.key for source in known) + 1
        sources = []
        for now in self.sources:
            was = next((source for source in known if source.identity == now.identity), None)
            if was is not None:
                known.remove(was)
                sources.append(replace(now, key=was.key, read=was.read))
            else:
                sources.append(replace(now, key=fresh))
                fresh += 1
        return History(tuple(sources), num_samples, tuple(known))


def _shares(sources: Sequence[Reading]) -> list[str]:
    return [str(share) for share in Mixture([source.weight for source in sources]).shares]
