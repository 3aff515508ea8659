"""What the other packages share: cheap dropout, faster matmuls, memory kept, care with files from strangers."""
