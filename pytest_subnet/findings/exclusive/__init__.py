"""Whether tasks keep out of each other's way: exclusive masks, exclusive updates, frozen ones."""
