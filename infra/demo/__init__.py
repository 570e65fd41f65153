"""The demo: a small web of emoji to crawl, the whole way from there to pictures, and a report."""
