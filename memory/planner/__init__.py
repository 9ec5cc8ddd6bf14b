"""Placement before loading: shapes, budgets, costs, forecasts. Pure data and arithmetic."""
