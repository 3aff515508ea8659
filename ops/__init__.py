"""What the other packages share: cheap dropout, a faster matmul, memory kept, care with files from strangers."""
