"""The routed experts' part of config.json, in the words of Qwen3-MoE and GLM-4-MoE."""

from __future__ import annotations

from typing import Any

from minnow.config import UserError
from minnow.model.experts_config import ExpertsConfig


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


def experts_from_hf(content: dict[str, Any]) -> ExpertsConfig | None:
    """Read the same from a content with its defaults; None for a dense model_type. UserError for what `Router` does
    not compute."""
    if content["model_type"] not in ("qwen3_moe", "glm4_moe"):
        return None
    common = {key: content[key] for key in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")}
    # Either class also knows its number of experts as num_local_experts.
    if content["model_type"] == "qwen3_moe":
        dense = sorted(content["mlp_only_layers"])
        if content["decoder_sparse_step"] != 1 or dense != list(range(len(dense))):
            raise UserError(
                f"decoder_sparse_step {content['decoder_sparse_step']} with mlp_only_layers {dense} is not "
                "supported (only the first layers may be dense)"
            )
        count = content.get("num_local_experts") or content["num_experts"]
        return ExpertsConfig(num_experts=count, first_k_dense_replace=len(dense), **common)
    count = content.get("num_local_experts") or content["n_routed_experts"]
    rest = ("n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group")
    return ExpertsConfig(num_experts=count, scoring="sigmoid", **common, **{key: content[key] for key in rest})
