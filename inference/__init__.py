"""Promptable 3D medical image segmentation: everything that ships in the image.

Conventions, the same in every module:

- Arrays are (D, H, W) = (z, y, x), C order.
- ``spacing_mm`` is (z, y, x), in millimetres; files store (x, y, z), and only ``case.py`` and
  ``nifti.py`` know.
- Boxes are half-open: ``start <= voxel < stop``; files store closed intervals.
- Labels are 1..N in the order of the file's prompts; 0 is background.
- A coordinate names the centre of a voxel: voxel ``i`` covers ``[i - 0.5, i + 0.5)``.
"""
