"""What other packages call batch normalisation, and how it differs from ours. No backend."""
