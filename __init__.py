"""wardround: train one model across hospitals; patients' records stay where they are."""
