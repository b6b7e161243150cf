"""Scripts behind the tables and figures of docs/; those that measure print hardware and versions first."""
