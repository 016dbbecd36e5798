"""Compare evaluated runs from their records alone: tests, verdict, tables, pictures, report. Loads no model."""
