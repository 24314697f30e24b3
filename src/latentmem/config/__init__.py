"""A whole experiment in one YAML file, read strictly: one frozen section a part, each default written once, here.

Classes elsewhere take plain arguments; only the recipes see a whole `Config`. Paths in it are relative to the folder a
command is started in, not to the file, so that the overrides and the file mean the same. Loads no torch.
"""

from latentmem.config.data import (
    CodeSection,
    DataSection,
    Family,
    HiddenFactsSection,
    MixPart,
    MixSection,
    OwnDataSection,
    PDDLSection,
    QASection,
    ReasoningSection,
    Rows,
    SandboxSection,
    SearchSection,
)
from latentmem.config.engine import ENGINE_FREE, EngineSection, LocalEngineSection, VLLMEngineSection
from latentmem.config.experiment import (
    FILLS_BANK,
    FILLS_BANK_IN_BANK,
    ComposerSection,
    Config,
    EvaluateSection,
    ModelSection,
)
from latentmem.config.memory import (
    BankSection,
    GenerativeSection,
    GMemorySection,
    InsightsSection,
    MemorySection,
    RivalsSection,
    VoyagerSection,
)
from latentmem.config.read import (
    dump_config,
    load_config,
    packaged_configs,
    packaged_grids,
    parse_config,
    parse_section,
    read_values,
    with_fields,
)
from latentmem.config.section import Section, default
from latentmem.config.serve import ServedRole, ServeSection
from latentmem.config.training import (
    CollectSection,
    ComposerOptimizerFields,
    GRPOSection,
    LMPOSection,
    OptimizerFields,
    Sampling,
    SFTSection,
    WarmupSection,
)

__all__ = [
    "ENGINE_FREE",
    "FILLS_BANK",
    "FILLS_BANK_IN_BANK",
    "BankSection",
    "CodeSection",
    "CollectSection",
    "ComposerOptimizerFields",
    "ComposerSection",
    "Config",
    "DataSection",
    "EngineSection",
    "EvaluateSection",
    "Family",
    "GMemorySection",
    "GRPOSection",
    "GenerativeSection",
    "HiddenFactsSection",
    "InsightsSection",
    "LMPOSection",
    "LocalEngineSection",
    "MemorySection",
    "MixPart",
    "MixSection",
    "ModelSection",
    "OptimizerFields",
    "OwnDataSection",
    "PDDLSection",
    "QASection",
    "ReasoningSection",
    "RivalsSection",
    "Rows",
    "SFTSection",
    "Sampling",
    "SandboxSection",
    "SearchSection",
    "Section",
    "ServeSection",
    "ServedRole",
    "VLLMEngineSection",
    "VoyagerSection",
    "WarmupSection",
    "default",
    "dump_config",
    "load_config",
    "packaged_configs",
    "packaged_grids",
    "parse_config",
    "parse_section",
    "read_values",
    "with_fields",
]
