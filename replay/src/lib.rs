//! Rules, counters, energy models and reports over optape traces.
