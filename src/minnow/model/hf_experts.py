"""The routed experts' part of config.json, in the words of Qwen3-MoE and GLM-4-MoE."""

from __future__ import annotations

from typing import Any

from minnow.config import UserError
from minnow.model.experts_config import ExpertsConfig

# What transformers' classes take for a key that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "glm4_moe": {
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": True,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
}


def experts_to_hf(experts: ExpertsConfig, *, qk_norm: bool) -> dict[str, Any]:
    """The keys that Qwen3MoeConfig (softmax) or Glm4MoeConfig (sigmoid) has beside those of a dense decoder."""
    content: dict[str, Any] = {
        "num_experts_per_tok": experts.num_experts_per_tok,
        "moe_intermediate_size": experts.moe_intermediate_size,
        "norm_topk_prob": experts.norm_topk_prob,
        "output_router_logits": False,
    }
    if experts.scoring == "softmax":
        return content | {
            "num_experts": experts.num_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(experts.first_k_dense_replace)),
            "router_aux_loss_coef": 0.001,
        }
    return content | {
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.n_shared_experts,
        "first_k_dense_replace": experts.first_k_dense_replace,
        "routed_scaling_factor": experts.routed_scaling_factor,
        "n_group": experts.n_group,
        "topk_group": experts.topk_group,
        "use_qk_norm": qk_norm,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def experts_from_hf(content: dict[str, Any], where: str) -> ExpertsConfig | None:
    """Read the same; None for a dense model_type. UserError, naming `where`, for what `Router` does not compute."""
    defaults = _DEFAULTS.get(content["model_type"])
    if defaults is None:
        return None
    values = {key: default if content.get(key) is None else content[key] for key, default in defaults.items()}
    common = {key: values[key] for key in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")}
    if content["model_type"] == "qwen3_moe":
        dense = sorted(values["mlp_only_layers"])
        if values["decoder_sparse_step"] != 1 or dense != list(range(len(dense))):
            raise UserError(
                f"{where}: decoder_sparse_step {values['decoder_sparse_step']} with mlp_only_layers {dense} is not "
                "supported (only the first layers may be dense)"
            )
        # transformers 4 reads num_experts; 5 has num_local_experts for the same.
        count = content.get("num_experts") or content.get("num_local_experts") or values["num_experts"]
        return ExpertsConfig(num_experts=count, first_k_dense_replace=len(dense), **common)
    count = content.get("n_routed_experts") or content.get("num_local_experts") or values["n_routed_experts"]
    rest = ("n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group")
    return ExpertsConfig(num_experts=count, scoring="sigmoid", **common, **{key: values[key] for key in rest})
