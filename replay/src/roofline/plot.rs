//! The picture of a roofline: both axes logarithmic, roofs as lines, scopes as circles whose area is their share of the time.

use std::fmt::Write as _;
use std::io::{self, Write};

use super::{Limit, Point, Roof, Roofline};
use crate::report::numbers;

const WIDTH: f64 = 1080.0;
const HEIGHT: f64 = 600.0;
/// The frame that points are drawn in.
const LEFT: f64 = 90.0;
const RIGHT: f64 = 760.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 530.0;
/// So many scopes have a number and a line in the legend: those that take the most time.
const LEGEND: usize = 24;

/// Colours that are told apart without red and green (M. Okabe, K. Ito, 2002).
const MEMORY_COLOUR: &str = "#0072b2";
const COMPUTE_COLOUR: &str = "#d55e00";
const UNHELD_COLOUR: &str = "#009e73";
const ROOF_COLOUR: &str = "#333333";
const OTHER_ROOF_COLOUR: &str = "#999999";
const GRID_COLOUR: &str = "#e4e4e4";

pub(super) fn write(roofline: &Roofline, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(picture(roofline).as_bytes())
}

/// A logarithmic axis over whole decades.
struct Axis {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
}

impl Axis {
    /// Over all of some values, which are above zero; `start` and `end` are where the ends are drawn.
    fn over(values: impl Iterator<Item = f64>, start: f64, end: f64) -> Self {
        let values = values.filter(|v| v.is_finite() && *v > 0.0);
        let (least, most) = values.fold((f64::INFINITY, 0.0f64), |(least, most), v| {
            (least.min(v), most.max(v))
        });
        let (least, most) = if least > most {
            (1.0, 1.0)
        } else {
            (least, most)
        };
        let from = least.log10().floor();
        let to = most.log10().ceil();
        Self {
            from,
            to: if to > from { to } else { from + 1.0 },
            start,
            end,
        }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value.log10() - self.from) / (self.to - self.from);
        self.start + share.clamp(0.0, 1.0) * (self.end - self.start)
    }

    fn least(&self) -> f64 {
        10f64.powf(self.from)
    }

    fn most(&self) -> f64 {
        10f64.powf(self.to)
    }

    fn decades(&self) -> impl Iterator<Item = f64> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "exponents of ten of floats"
        )]
        let (from, to) = (self.from as i32, self.to as i32);
        (from..=to).map(|exponent| 10f64.powi(exponent))
    }
}

/// A point with its place: at the rate that was reached, or where its time is not known on the roof.
struct Placed<'a> {
    point: &'a Point,
    intensity: f64,
    rate: f64,
    reached: bool,
}

fn placed(roofline: &Roofline) -> Vec<Placed<'_>> {
    let mut placed: Vec<Placed<'_>> = roofline
        .points
        .iter()
        .filter_map(|point| {
            let intensity = point.flop_per_byte.filter(|i| *i > 0.0)?;
            let rate = point.flop_per_s.or(point.attainable_flop_per_s)?;
            (rate > 0.0).then_some(Placed {
                point,
                intensity,
                rate,
                reached: point.flop_per_s.is_some(),
            })
        })
        .collect();
    placed.sort_by_key(|p| std::cmp::Reverse((p.point.time_ns, p.point.flop)));
    placed
}

fn picture(roofline: &Roofline) -> String {
    let placed = placed(roofline);
    let roofs: &[Roof] = roofline.peaks.as_ref().map_or(&[], |p| &p.roofs);
    let ridges = roofs.iter().map(Roof::ridge_flop_per_byte);
    // Room on both sides of the ridge and of every point.
    let x = Axis::over(
        placed
            .iter()
            .map(|p| p.intensity)
            .chain(ridges.flat_map(|r| [r / 4.0, r * 4.0])),
        LEFT,
        RIGHT,
    );
    let least_roof = roofs
        .iter()
        .map(|roof| roof.attainable_flop_per_s(x.least()));
    let y = Axis::over(
        placed
            .iter()
            .map(|p| p.rate)
            .chain(roofs.iter().map(|r| r.flop_per_s * 1.2))
            .chain(least_roof),
        BOTTOM,
        TOP,
    );
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">"
    );
    let _ = writeln!(
        svg,
        "<title>{}</title>\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>",
        escaped(&title(roofline))
    );
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"28\" font-size=\"15\">{}</text>",
        escaped(&title(roofline))
    );
    axes(&mut svg, &x, &y);
    // The roof that points are held against has the first choice of a place for its name, and is drawn last.
    let is_main = |roof: &Roof| roofline.roof.as_ref() == Some(roof);
    let mut named: Vec<&Roof> = roofs.iter().collect();
    named.sort_by_key(|roof| !is_main(roof));
    let mut taken = Vec::new();
    let named: Vec<(&Roof, f64)> = named
        .into_iter()
        .map(|roof| (roof, free_place(&mut taken, y.at(roof.flop_per_s))))
        .collect();
    for (roof, label) in named.into_iter().rev() {
        draw_roof(&mut svg, roof, label, is_main(roof), &x, &y);
    }
    let all_time: u64 = roofline.total.time_ns.unwrap_or(0);
    for (at, placed) in placed.iter().enumerate().rev() {
        draw_point(&mut svg, placed, at, all_time, &x, &y);
    }
    legend(&mut svg, roofline, &placed);
    svg.push_str("</svg>\n");
    svg
}

fn title(roofline: &Roofline) -> String {
    let traces: Vec<&str> = roofline.trace.iter().map(|t| t.path.as_str()).collect();
    let machine = match &roofline.peaks {
        Some(peaks) => format!(" on {}", peaks.machine),
        None => String::new(),
    };
    format!("{}{machine}, by {}", traces.join(", "), roofline.by)
}

fn axes(svg: &mut String, x: &Axis, y: &Axis) {
    for value in x.decades() {
        let at = x.at(value);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{BOTTOM}\" stroke=\"{GRID_COLOUR}\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{value}</text>",
            BOTTOM + 18.0
        );
    }
    for value in y.decades() {
        let at = y.at(value);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{RIGHT}\" y2=\"{at:.1}\" stroke=\"{GRID_COLOUR}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            escaped(&numbers::scaled(value, ""))
        );
    }
    let _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"none\" stroke=\"{ROOF_COLOUR}\"/>",
        RIGHT - LEFT,
        BOTTOM - TOP
    );
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">operations per byte</text>",
        f64::midpoint(LEFT, RIGHT),
        BOTTOM + 40.0
    );
    let middle = f64::midpoint(TOP, BOTTOM);
    let _ = writeln!(
        svg,
        "<text x=\"24\" y=\"{middle:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 24 {middle:.1})\">operations per second</text>"
    );
}

/// Where a roof's name does not lie upon another one: above its line, else below it, else further down.
fn free_place(taken: &mut Vec<f64>, line: f64) -> f64 {
    let free = |at: &f64| taken.iter().all(|other| (other - at).abs() >= 13.0);
    let below = (0..8u8).map(|step| line + 15.0 + 14.0 * f64::from(step));
    let place = std::iter::once(line - 5.0).chain(below).find(free);
    let place = place.unwrap_or(line - 5.0);
    taken.push(place);
    place
}

fn draw_roof(svg: &mut String, roof: &Roof, label: f64, main: bool, x: &Axis, y: &Axis) {
    let (colour, width) = if main {
        (ROOF_COLOUR, 2.0)
    } else {
        (OTHER_ROOF_COLOUR, 1.0)
    };
    let ridge = roof.ridge_flop_per_byte().clamp(x.least(), x.most());
    let points: Vec<String> = [x.least(), ridge, x.most()]
        .into_iter()
        .map(|intensity| {
            let rate = roof.attainable_flop_per_s(intensity);
            format!("{:.1},{:.1}", x.at(intensity), y.at(rate))
        })
        .collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"/>\
         <text x=\"{:.1}\" y=\"{label:.1}\" text-anchor=\"end\" fill=\"{colour}\">{}: {}, {}</text>",
        points.join(" "),
        RIGHT - 6.0,
        escaped(&roof.name),
        escaped(&numbers::scaled(roof.flop_per_s, "FLOP/s")),
        escaped(&numbers::scaled(roof.bytes_per_s, "B/s"))
    );
}

fn colour(point: &Point) -> &'static str {
    match point.limit {
        Some(Limit::Memory) => MEMORY_COLOUR,
        Some(Limit::Compute) => COMPUTE_COLOUR,
        None => UNHELD_COLOUR,
    }
}

fn draw_point(svg: &mut String, placed: &Placed<'_>, at: usize, all_time: u64, x: &Axis, y: &Axis) {
    let point = placed.point;
    #[expect(clippy::cast_precision_loss, reason = "for the eye")]
    let share = match (point.time_ns, all_time) {
        (Some(time), all) if all > 0 => (time as f64 / all as f64).min(1.0),
        _ => 0.0,
    };
    let radius = 4.0 + 14.0 * share.sqrt();
    let colour = colour(point);
    let fill = if placed.reached { colour } else { "none" };
    let (cx, cy) = (x.at(placed.intensity), y.at(placed.rate));
    let reached = if placed.reached {
        format!(
            "{}, {:.1} % of the time",
            numbers::scaled(placed.rate, "FLOP/s"),
            100.0 * share
        )
    } else {
        "time unknown: drawn on the roof".to_owned()
    };
    let _ = writeln!(
        svg,
        "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"{radius:.1}\" fill=\"{fill}\" fill-opacity=\"0.55\" stroke=\"{colour}\">\
         <title>{}: {} FLOP per byte, {}</title></circle>",
        escaped(&point.key),
        super::write::intensity(Some(placed.intensity)),
        escaped(&reached)
    );
    if at < LEGEND {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{}</text>",
            cx + radius + 2.0,
            cy + 4.0,
            at + 1
        );
    }
}

fn legend(svg: &mut String, roofline: &Roofline, placed: &[Placed<'_>]) {
    let mut lines: Vec<(&str, String)> = placed
        .iter()
        .take(LEGEND)
        .enumerate()
        .map(|(at, placed)| {
            let name = shortened(&placed.point.key);
            (colour(placed.point), format!("{} {name}", at + 1))
        })
        .collect();
    if placed.len() > LEGEND {
        lines.push((ROOF_COLOUR, format!("and {} more", placed.len() - LEGEND)));
    }
    let left_out = roofline.points.len() - placed.len();
    if left_out > 0 {
        lines.push((
            ROOF_COLOUR,
            format!("{left_out} without arithmetic or time"),
        ));
    }
    if roofline.roof.is_some() {
        lines.push((MEMORY_COLOUR, "limited by memory".to_owned()));
        lines.push((COMPUTE_COLOUR, "limited by arithmetic".to_owned()));
    }
    let mut y = TOP + 10.0;
    for (colour, text) in lines {
        let _ = writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
            RIGHT + 22.0,
            y - 4.0,
            RIGHT + 32.0,
            escaped(&text)
        );
        y += 17.0;
    }
}

/// The end of a long name says more than its beginning.
fn shortened(name: &str) -> String {
    const ROOM: usize = 38;
    let length = name.chars().count();
    if length <= ROOM {
        return name.to_owned();
    }
    let end: String = name.chars().skip(length - ROOM + 3).collect();
    format!("...{end}")
}

/// A trace is untrusted: no name ends an element.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_span_whole_decades_and_survive_nothing() {
        let axis = Axis::over([0.3, 42.0].into_iter(), 0.0, 100.0);
        assert!((axis.least() - 0.1).abs() < 1e-12 && (axis.most() - 100.0).abs() < 1e-9);
        assert!(axis.at(0.1).abs() < 1e-9 && (axis.at(100.0) - 100.0).abs() < 1e-9);
        assert_eq!(axis.decades().count(), 4);
        let empty = Axis::over(std::iter::empty(), 0.0, 1.0);
        assert!(empty.most() > empty.least());
        let one = Axis::over(std::iter::once(1.0), 0.0, 1.0);
        assert!(one.most() > one.least());
    }

    #[test]
    fn names_of_roofs_do_not_lie_upon_each_other() {
        let mut taken = Vec::new();
        let places: Vec<f64> = [100.0, 101.0, 99.0, 160.0]
            .into_iter()
            .map(|line| free_place(&mut taken, line))
            .collect();
        for (at, place) in places.iter().enumerate() {
            assert!(
                places[..at].iter().all(|p| (p - place).abs() >= 13.0),
                "{places:?}"
            );
        }
        assert!((places[0] - 95.0).abs() < 1e-9);
    }

    #[test]
    fn names_cannot_leave_their_element() {
        assert_eq!(
            escaped("</text><script>\"&\u{1b}"),
            "&lt;/text&gt;&lt;script&gt;&quot;&amp;\u{fffd}"
        );
        assert_eq!(shortened("short"), "short");
        assert!(shortened(&"x".repeat(100)).starts_with("...x"));
    }
}
