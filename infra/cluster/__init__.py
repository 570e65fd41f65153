"""Everything a cluster needs, rendered from one settings file: images, Kubernetes, Ray, Slurm, Terraform."""
