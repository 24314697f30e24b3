"""Rows as a run's results.json has them, for tests of a grid's numbers and of its report."""


def memory_row(name, successes, **values):
    """One memory's row; `values` are those that the test is about, and replace these."""
    share = sum(successes) / len(successes)
    return {
        "name": name,
        "accuracy": share,
        "reward": share,
        "no_answer": 0.0,
        "generated_tokens": 20.0,
        "memory_prompt_tokens": 0.0,
        "memory_generated_tokens": 0.0,
        "learning": None,
        "peak_memory_mb": 1.0,
        "successes": successes,
        "rewards": [float(s) for s in successes],
        "vs_none": None,
        "vs_text": None,
        **values,
    }


def against(difference, p):
    return {"difference": difference, "low": difference - 0.1, "high": difference + 0.1, "p_value": p}
