"""A bank gets vectors of another embedder: all of them in one transaction, after hours of embedding outside of it."""

from collections.abc import Callable

from latentmem.bank.embedding import Embed, unit_vectors
from latentmem.bank.exact import Vectors
from latentmem.bank.records import Records
from latentmem.bank_place import Place

BATCH_SIZE = 256
"""Number of texts that the embedder gets at once."""


def reembed_records(
    records: Records, where: Place, embed: Embed, embedder: str, on_progress: Callable[[int, int], object]
) -> int:
    """Embed every task text anew and return the number of trajectories.

    No lock is held while the embedder runs; what others store meanwhile is embedded too.

    Args:
        records: what is embedded.
        where: names the bank in errors.
        embed: the new embedder.
        embedder: its name, from then on the bank's embedder.
        on_progress: gets the number of trajectories done so far, and of those known so far, after each batch.

    Raises:
        BankError: a vector is useless, the bank is locked, or the disk is full.
    """
    vectors: dict[int, Vectors] = {}
    while True:
        with records.write() as transaction:
            unseen = transaction.texts(after=max(vectors, default=0))
            if not unseen:
                transaction.replace_vectors(vectors)
                for vector in list(vectors.values())[:1]:
                    transaction.set_embedder(embedder, len(vector))
                return len(vectors)
        num_known = len(vectors) + len(unseen)
        for start in range(0, len(unseen), BATCH_SIZE):
            seqs, texts, ids = zip(*unseen[start : start + BATCH_SIZE], strict=True)
            new = unit_vectors(embed, list(texts), [f"{where}: trajectory {id_}" for id_ in ids])
            vectors.update(zip(seqs, new, strict=True))
            on_progress(len(vectors), num_known)
