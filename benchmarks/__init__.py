"""One script per figure of docs/performance.md and docs/results.md; each prints hardware and versions first."""
