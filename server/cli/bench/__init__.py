"""`loci bench ...`: one file a benchmark."""
