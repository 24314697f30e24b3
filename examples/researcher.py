"""Play, remember, train, compare: the whole system in a few lines."""

import sys
from pathlib import Path
from tempfile import mkdtemp

from latentmem import (
    Composer,
    Embedder,
    ExperienceBank,
    LanguageModel,
    LatentMemory,
    LMPOTrainer,
    NoMemory,
    ReasoningDomain,
    Sampling,
    TextMemory,
    evaluate,
    load_team,
    rollout,
)

folder = Path(mkdtemp(prefix="latentmem-"))
model = LanguageModel.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
team = load_team("solo")
domain = ReasoningDomain("chain_sum", max_terms=2, max_digits=1, train_size=8, test_size=8)
short = Sampling(max_response_tokens=8)

bank = ExperienceBank(folder / "bank.sqlite", Embedder())
bank.add(rollout(team, NoMemory(), model, domain.tasks("train"), domain.start, sampling=short).trajectories)
memory = LatentMemory(bank, Composer(model, num_latents=4), only_successes=False)
trainer = LMPOTrainer(
    memory, model, team, domain, num_steps=2, tasks_per_step=2, group_size=4, sampling=short, max_resamples=1
)
trainer.train(folder / "checkpoints")
memories = {"none": NoMemory(), "text": TextMemory(bank, only_successes=False), "latent": memory}
results = evaluate(team, model, memories, domain, sampling=Sampling(temperature=0, max_response_tokens=8))
print(results.table())
