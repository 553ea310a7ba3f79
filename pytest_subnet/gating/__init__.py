"""What a release must satisfy: baselines that were recorded, policies that were written."""
