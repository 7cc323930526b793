"""What people look at: tables, figures, pages and W&B reports of one run or several."""
