"""Networks: they operate on tokens and know nothing about images or schedules."""
