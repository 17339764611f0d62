"""SAs that are at another gateway: detours, what stands behind them, who hears of it."""
