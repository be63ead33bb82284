"""One file per family of networks: all that is known of it. The table is `models.networks.NETWORKS`."""
