"""What the other packages share beneath them: cheap dropout, the faster matmul, care with files from strangers."""
