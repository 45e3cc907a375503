"""The table of model families. A new one is an object in a file of its own, and a row here."""

from checkpoints_tools.families.apertus import APERTUS
from checkpoints_tools.families.arcee import ARCEE
from checkpoints_tools.families.cohere import COHERE
from checkpoints_tools.families.cohere2 import COHERE2
from checkpoints_tools.families.cwm import CWM
from checkpoints_tools.families.deepseek_v2 import DEEPSEEK_V2
from checkpoints_tools.families.deepseek_v3 import DEEPSEEK_V3
from checkpoints_tools.families.ernie4_5 import ERNIE4_5
from checkpoints_tools.families.ernie4_5_moe import ERNIE4_5_MOE
from checkpoints_tools.families.exaone import EXAONE
from checkpoints_tools.families.exaone4 import EXAONE4
from checkpoints_tools.families.family import Family
from checkpoints_tools.families.gemma import GEMMA
from checkpoints_tools.families.gemma2 import GEMMA2
from checkpoints_tools.families.gemma3_text import GEMMA3_TEXT
from checkpoints_tools.families.glm import GLM
from checkpoints_tools.families.glm4 import GLM4
from checkpoints_tools.families.glm4_moe import GLM4_MOE
from checkpoints_tools.families.glm4_moe_lite import GLM4_MOE_LITE
from checkpoints_tools.families.gpt_oss import GPT_OSS
from checkpoints_tools.families.granite import GRANITE
from checkpoints_tools.families.granite_swa import GRANITE_SWA
from checkpoints_tools.families.granitemoe import GRANITEMOE
from checkpoints_tools.families.granitemoehybrid import GRANITEMOEHYBRID
from checkpoints_tools.families.helium import HELIUM
from checkpoints_tools.families.hunyuan_v1_dense import HUNYUAN_V1_DENSE
from checkpoints_tools.families.hyperclovax import HYPERCLOVAX
from checkpoints_tools.families.internlm3 import INTERNLM3
from checkpoints_tools.families.iquestcoder import IQUESTCODER
from checkpoints_tools.families.jais2 import JAIS2
from checkpoints_tools.families.kimi_k2 import KIMI_K2
from checkpoints_tools.families.llama import LLAMA
from checkpoints_tools.families.llama4_text import LLAMA4_TEXT
from checkpoints_tools.families.minicpm3 import MINICPM3
from checkpoints_tools.families.ministral import MINISTRAL
from checkpoints_tools.families.ministral3 import MINISTRAL3
from checkpoints_tools.families.missing import MISSING
from checkpoints_tools.families.mistral import MISTRAL
from checkpoints_tools.families.mixtral import MIXTRAL
from checkpoints_tools.families.nemotron import NEMOTRON
from checkpoints_tools.families.olmo2 import OLMO2
from checkpoints_tools.families.olmo3 import OLMO3
from checkpoints_tools.families.olmoe import OLMOE
from checkpoints_tools.families.phi3 import PHI3
from checkpoints_tools.families.qwen2 import QWEN2
from checkpoints_tools.families.qwen2_moe import QWEN2_MOE
from checkpoints_tools.families.qwen3 import QWEN3
from checkpoints_tools.families.qwen3_moe import QWEN3_MOE
from checkpoints_tools.families.sarvam_mla import SARVAM_MLA
from checkpoints_tools.families.seed_oss import SEED_OSS
from checkpoints_tools.families.smollm3 import SMOLLM3
from checkpoints_tools.families.stablelm import STABLELM
from checkpoints_tools.families.starcoder2 import STARCODER2
from checkpoints_tools.families.vaultgemma import VAULTGEMMA
from checkpoints_tools.families.youtu import YOUTU
from megatron_star.checked_input import shown

_TABLE = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    MINISTRAL,
    MINISTRAL3,
    PHI3,
    SMOLLM3,
    OLMO2,
    OLMO3,
    GRANITE,
    GRANITEMOEHYBRID,
    GRANITE_SWA,
    HYPERCLOVAX,
    EXAONE,
    INTERNLM3,
    IQUESTCODER,
    CWM,
    HELIUM,
    JAIS2,
    STABLELM,
    GEMMA,
    COHERE,
    GEMMA2,
    GEMMA3_TEXT,
    VAULTGEMMA,
    COHERE2,
    EXAONE4,
    GLM,
    GLM4,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GRANITEMOE,
    GLM4_MOE,
    SEED_OSS,
    ARCEE,
    STARCODER2,
    ERNIE4_5,
    ERNIE4_5_MOE,
    GPT_OSS,
    NEMOTRON,
    HUNYUAN_V1_DENSE,
    APERTUS,
    LLAMA4_TEXT,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE_LITE,
    KIMI_K2,
    MINICPM3,
    SARVAM_MLA,
    YOUTU,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _TABLE}


def family_named(model_type: object) -> Family:
    """The family of a config.json's `model_type`; ValueError if it is not in the table."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    missing = MISSING.get(model_type) if isinstance(model_type, str) else None
    reason = f" (missing here: {missing})" if missing else ""
    raise ValueError(
        f"model_type {shown(model_type)} is not supported{reason}; supported: {', '.join(FAMILIES)}"
    )
