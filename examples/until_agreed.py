"""A team of your own: two members answer in turn until they say the same."""

from collections.abc import Sequence

from latentmem import Call, Role, Step, Turn


class UntilAgreed:
    """Two members; each reads what the other said last."""

    name = "until_agreed"

    def __init__(self, max_rounds: int = 3) -> None:
        self.max_rounds = max_rounds
        self.roles = (Role(name="first", profile="answers first"), Role(name="second", profile="checks the answer"))

    def turn(self, task: str, instructions: str, history: Sequence[Step]) -> Turn:
        """Yield the calls of those who speak next; each yield gives back their responses."""
        first, second = self.roles
        said = ""
        for number in range(self.max_rounds):
            before = f"\nSo far: {said}" if said else ""
            (answer,) = yield [Call(first, f"You are the one who {first.profile}. {instructions}", task + before)]
            reads = (2 * number,)
            (check,) = yield [
                Call(
                    second, f"You are the one who {second.profile}. {instructions}", f"{task}\nSo far: {answer}", reads
                )
            ]
            if check.strip() == answer.strip():
                return answer
            said = check
        return said
