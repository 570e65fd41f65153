"""From URLs to a published snapshot of latents: crawl, caption, filter, encode, publish."""
