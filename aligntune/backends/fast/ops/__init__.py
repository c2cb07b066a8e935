"""Ops: one file each; a torch reference and a Triton kernel behind one signature."""
