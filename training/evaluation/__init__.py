"""Evaluation by the rules of the CVPR 2025 interactive 3D segmentation challenge."""
