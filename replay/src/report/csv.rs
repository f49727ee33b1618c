//! The report as CSV: one line per number without grouping, one line per group with it. Numbers are plain, units stand
//! in the head or beside them.

use std::io::Write;

use super::{Group, Report};
use crate::error::ReplayError;

pub(super) fn write(report: &Report, out: &mut dyn Write) -> Result<(), ReplayError> {
    let mut csv = csv::Writer::from_writer(out);
    match &report.groups {
        Some(groups) => {
            let divided = report.per.as_ref();
            let per = divided
                .map(|p| format!(" per {}", p.unit))
                .unwrap_or_default();
            let mut head = vec![report.by.clone().unwrap_or_default(), "calls".to_owned()];
            head.extend(
                report
                    .counters
                    .iter()
                    .map(|(name, c)| format!("{name} [{}{per}]", c.unit)),
            );
            head.extend(
                report
                    .energy
                    .iter()
                    .map(|(name, _)| format!("{name} [pJ{per}]")),
            );
            let measured = measured_devices(report, groups);
            head.extend(measured.iter().map(|device| format!("{device} [J{per}]")));
            line(&mut csv, &head)?;
            for group in groups {
                let mut row = vec![group.key.clone(), group.calls.to_string()];
                match (&group.per, divided) {
                    (Some(per), _) => {
                        row.extend(per.counters.values().map(ToString::to_string));
                        row.extend(per.energy_total_pj.values().map(ToString::to_string));
                        row.extend(
                            measured
                                .iter()
                                .map(|device| number(per.measured_j.get(device))),
                        );
                    }
                    // A group without a divisor of its own has no mean.
                    (None, Some(_)) => {
                        row.extend(std::iter::repeat_n(String::new(), head.len() - 2))
                    }
                    (None, None) => {
                        row.extend(group.counters.values().map(|c| c.total.to_string()));
                        row.extend(group.energy.values().map(|e| e.total_pj.to_string()));
                        row.extend(measured.iter().map(|device| {
                            number(group.measured.as_ref().and_then(|m| m.energy_j.get(device)))
                        }));
                    }
                }
                line(&mut csv, &row)?;
            }
        }
        None => flat(report, &mut csv)?,
    }
    csv.flush()?;
    Ok(())
}

/// Devices with measured energy, where groups have any.
fn measured_devices<'r>(report: &'r Report, groups: &[Group]) -> Vec<&'r str> {
    let total = report
        .monitors
        .as_ref()
        .and_then(|m| m.hardware.measured.as_ref());
    match total {
        Some(total) if groups.iter().any(|g| g.measured.is_some()) => {
            total.energy_j.iter().map(|(device, _)| device).collect()
        }
        _ => Vec::new(),
    }
}

fn number(value: Option<&f64>) -> String {
    value.map(ToString::to_string).unwrap_or_default()
}

fn flat<W: Write>(report: &Report, csv: &mut csv::Writer<W>) -> Result<(), ReplayError> {
    line(csv, &["section", "name", "scope", "op", "value", "unit"])?;
    for (name, counter) in report.counters.iter() {
        line(
            csv,
            &[
                "counters",
                name,
                "",
                "",
                &counter.total.to_string(),
                &counter.unit,
            ],
        )?;
        for (scope, ops) in &counter.scopes {
            for (op, value) in ops {
                line(
                    csv,
                    &[
                        "counters",
                        name,
                        scope,
                        op,
                        &value.to_string(),
                        &counter.unit,
                    ],
                )?;
            }
        }
    }
    for (name, energy) in report.energy.iter() {
        line(
            csv,
            &["energy", name, "", "", &energy.total_pj.to_string(), "pJ"],
        )?;
    }
    if let Some(measured) = report
        .monitors
        .as_ref()
        .and_then(|m| m.hardware.measured.as_ref())
    {
        for (name, values, unit) in [
            ("energy", &measured.energy_j, "J"),
            ("mean_power", &measured.mean_power_w, "W"),
            ("peak_memory", &measured.peak_memory_bytes, "byte"),
        ] {
            for (device, value) in values.iter() {
                line(
                    csv,
                    &["measured", name, device, "", &value.to_string(), unit],
                )?;
            }
        }
    }
    for layer in &report.firing_rates {
        let rate = layer.rate.map(|r| r.to_string()).unwrap_or_default();
        line(
            csv,
            &[
                "firing_rates",
                "rate",
                &layer.module,
                "",
                &rate,
                "spikes per neuron and time step",
            ],
        )?;
    }
    let divided = [("per", &report.per), ("per_sample", &report.per_sample)];
    for (section, per) in divided {
        let Some(per) = per else { continue };
        for (name, value) in per.counters.iter() {
            let unit = report
                .counters
                .get(name)
                .map(|c| format!("{} per {}", c.unit, per.unit))
                .unwrap_or_default();
            line(csv, &[section, name, "", "", &value.to_string(), &unit])?;
        }
        for (name, value) in per.energy_total_pj.iter() {
            let unit = format!("pJ per {}", per.unit);
            line(csv, &[section, name, "", "", &value.to_string(), &unit])?;
        }
    }
    let basis = &report.basis;
    for (name, figure) in basis.figures.iter() {
        line(
            csv,
            &["basis", name, "", "", &figure.estimator, "estimator"],
        )?;
        line(csv, &["basis", name, "", "", &figure.stages, "stages"])?;
        if let Some(regime) = &figure.regime {
            line(csv, &["basis", name, "", "", regime, "costs"])?;
        }
    }
    for layer in &basis.layers {
        if let Some(sparsity) = layer.input.sparsity {
            let (value, unit) = (sparsity.to_string(), "share of zeros");
            line(
                csv,
                &["basis", "input_sparsity", &layer.module, "", &value, unit],
            )?;
        }
    }
    Ok(())
}

fn line<W: Write, S: AsRef<[u8]>>(csv: &mut csv::Writer<W>, row: &[S]) -> Result<(), ReplayError> {
    csv.write_record(row)
        .map_err(|error| match error.into_kind() {
            // As it came, so that a closed pipe is still seen as one.
            csv::ErrorKind::Io(error) => ReplayError::Write(error),
            other => ReplayError::Write(std::io::Error::other(format!("{other:?}"))),
        })
}
