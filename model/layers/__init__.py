"""What a block is made of: linear layers, and the operations that Triton or torch computes."""
