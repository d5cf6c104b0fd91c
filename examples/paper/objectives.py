"""Options of `NeMoConfig` for the objectives of other papers, with their settings for convolutional models."""

PAPER = {"masks": "generated", "contrastive_weight": 0.5, "hard_masks": False, "rehearsal_probability": 0.0,
         "sparsity_weight": 0.0, "detach_pooled": False, "retention_target": None,
         "relevance_threshold": 0.9}  # fmt: skip
"""As in the NeMo paper (arXiv 2508.11348): soft masks, no rehearsal, modules cut at a threshold of .9."""
NEMO = {**PAPER, "contrastive_weight": 1.2}
"""Within the range that the paper gives for CNNs."""
NEMO_AUTHORS = {**NEMO, "objective": "contrastive-authors"}
MWT = {**PAPER, "objective": "cohesion-coupling", "coupling_weight": 3.0}
"""MwT (arXiv 2306.09376) with the weights .5 and 1.5 of MODA's repository for ResNet18 on CIFAR-10."""
MODA = {**PAPER, "objective": "moda", "hard_masks": True, "warmup_ratio": 0.0, "contrastive_weight": 1.0,
        "coupling_weight": 1.0, "sparsity_weight": 0.3}  # fmt: skip
"""MODA (arXiv 2411.01074) with the default weights of affinity, dispersion and compactness of its authors' code."""
