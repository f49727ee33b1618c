//! From a formula's text to its tree.

use std::ops::Range;

use super::rational::Rational;

/// Deeper nesting than any formula needs, and less than the stack holds.
const DEEPEST: usize = 64;
/// Longer than any formula.
const LONGEST: usize = 8192;

/// A part of a formula.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    /// Where it stands in the text, in bytes.
    pub(crate) span: Range<usize>,
    pub(crate) kind: NodeKind,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum NodeKind {
    Number(Number),
    Text(String),
    Bool(bool),
    Name(String),
    List(Vec<Node>),
    Call(String, Vec<Node>),
    Index(Box<Node>, Box<Node>),
    Negate(Box<Node>),
    Not(Box<Node>),
    Binary(Operator, Box<Node>, Box<Node>),
}

/// A number as it is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Number {
    /// `None` where it is no fraction of 128 bits.
    pub(crate) exact: Option<Rational>,
    pub(crate) float: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Remainder,
    Power,
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    And,
    Or,
}

impl Operator {
    pub(crate) const fn symbol(self) -> &'static str {
        match self {
            Self::Add => "+",
            Self::Subtract => "-",
            Self::Multiply => "*",
            Self::Divide => "/",
            Self::FloorDivide => "//",
            Self::Remainder => "%",
            Self::Power => "^",
            Self::Equal => "==",
            Self::Unequal => "!=",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
            Self::And => "and",
            Self::Or => "or",
        }
    }

    /// How tightly it binds.
    const fn binding(self) -> u8 {
        match self {
            Self::Or => 1,
            Self::And => 2,
            Self::Equal
            | Self::Unequal
            | Self::Less
            | Self::LessOrEqual
            | Self::Greater
            | Self::GreaterOrEqual => COMPARISON,
            Self::Add | Self::Subtract => 5,
            Self::Multiply | Self::Divide | Self::FloorDivide | Self::Remainder => 6,
            Self::Power => 8,
        }
    }
}

/// Of `not`, of comparisons, of the sign.
const NOT: u8 = 3;
const COMPARISON: u8 = 4;
const SIGN: u8 = 7;

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SyntaxError {
    pub(crate) span: Range<usize>,
    pub(crate) message: String,
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Number(Number),
    Text(String),
    Name(String),
    Operator(Operator),
    Open,
    Close,
    OpenList,
    CloseList,
    Comma,
    End,
}

impl Token {
    fn shown(&self) -> String {
        match self {
            Self::Number(number) => number.float.to_string(),
            Self::Text(text) => format!("'{text}'"),
            Self::Name(name) => format!("'{name}'"),
            Self::Operator(operator) => format!("'{}'", operator.symbol()),
            Self::Open => "'('".to_owned(),
            Self::Close => "')'".to_owned(),
            Self::OpenList => "'['".to_owned(),
            Self::CloseList => "']'".to_owned(),
            Self::Comma => "','".to_owned(),
            Self::End => "the end".to_owned(),
        }
    }
}

fn wrong<T>(span: Range<usize>, message: impl Into<String>) -> Result<T, SyntaxError> {
    Err(SyntaxError {
        span,
        message: message.into(),
    })
}

fn tokens(text: &str) -> Result<Vec<(Token, Range<usize>)>, SyntaxError> {
    if text.len() > LONGEST {
        return wrong(0..0, format!("a formula has at most {LONGEST} bytes"));
    }
    let mut all = Vec::new();
    let mut at = 0;
    while let Some(first) = text.get(at..).and_then(|rest| rest.chars().next()) {
        let rest = text.get(at..).unwrap_or("");
        let length_of = |take: fn(char) -> bool| {
            rest.char_indices()
                .find(|(_, c)| !take(*c))
                .map_or(rest.len(), |(end, _)| end)
        };
        let (token, length) = match first {
            c if c.is_whitespace() => {
                at += c.len_utf8();
                continue;
            }
            c if c.is_ascii_digit() || c == '.' => number(rest, at)?,
            c if c.is_ascii_alphabetic() || c == '_' => {
                let length = length_of(|c| c.is_ascii_alphanumeric() || c == '_');
                let name = rest.get(..length).unwrap_or("");
                let token = match name {
                    "and" => Token::Operator(Operator::And),
                    "or" => Token::Operator(Operator::Or),
                    _ => Token::Name(name.to_owned()),
                };
                (token, length)
            }
            quote @ ('\'' | '"') => {
                let inside = rest.get(1..).unwrap_or("");
                let Some(end) = inside.find(quote) else {
                    return wrong(at..text.len(), format!("a text without its closing {quote}"));
                };
                let text = inside.get(..end).unwrap_or("").to_owned();
                (Token::Text(text), end + 2)
            }
            _ => symbol(rest, at)?,
        };
        all.push((token, at..at + length));
        at += length;
    }
    all.push((Token::End, text.len()..text.len()));
    Ok(all)
}

fn symbol(rest: &str, at: usize) -> Result<(Token, usize), SyntaxError> {
    // Longer ones first.
    const SYMBOLS: [(&str, Operator); 13] = [
        ("//", Operator::FloorDivide),
        ("==", Operator::Equal),
        ("!=", Operator::Unequal),
        ("<=", Operator::LessOrEqual),
        (">=", Operator::GreaterOrEqual),
        ("<", Operator::Less),
        (">", Operator::Greater),
        ("+", Operator::Add),
        ("-", Operator::Subtract),
        ("*", Operator::Multiply),
        ("/", Operator::Divide),
        ("%", Operator::Remainder),
        ("^", Operator::Power),
    ];
    if rest.starts_with("**") {
        return wrong(at..at + 2, "a power is written with ^");
    }
    if let Some((symbol, operator)) = SYMBOLS.iter().find(|(s, _)| rest.starts_with(s)) {
        return Ok((Token::Operator(*operator), symbol.len()));
    }
    let first = rest.chars().next().unwrap_or(' ');
    let token = match first {
        '(' => Token::Open,
        ')' => Token::Close,
        '[' => Token::OpenList,
        ']' => Token::CloseList,
        ',' => Token::Comma,
        '=' => return wrong(at..at + 1, "to compare, write =="),
        other => {
            return wrong(
                at..at + other.len_utf8(),
                format!("'{other}' means nothing in a formula"),
            );
        }
    };
    Ok((token, 1))
}

fn number(rest: &str, at: usize) -> Result<(Token, usize), SyntaxError> {
    let digits = |from: usize| {
        rest.get(from..).map_or(from, |tail| {
            from + tail
                .find(|c: char| !c.is_ascii_digit() && c != '_')
                .unwrap_or(tail.len())
        })
    };
    let mut end = digits(0);
    if rest.get(end..).is_some_and(|tail| tail.starts_with('.')) {
        end = digits(end + 1);
    }
    if let Some(tail) = rest.get(end..)
        && tail.starts_with(['e', 'E'])
    {
        let sign = usize::from(tail.get(1..).is_some_and(|t| t.starts_with(['+', '-'])));
        let power = digits(end + 1 + sign);
        if power > end + 1 + sign {
            end = power;
        }
    }
    let plain = rest.get(..end).unwrap_or("").replace('_', "");
    let Ok(float) = plain.parse::<f64>() else {
        return wrong(at..at + end, format!("'{plain}' is no number"));
    };
    let exact = exact(&plain);
    Ok((Token::Number(Number { exact, float }), end))
}

/// A decimal number as a fraction.
fn exact(text: &str) -> Option<Rational> {
    let lower = text.to_ascii_lowercase();
    let (digits, power) = match lower.split_once('e') {
        Some((digits, power)) => (digits, power.parse::<i128>().ok()?),
        None => (lower.as_str(), 0),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all = format!("{whole}{fraction}");
    let value = Rational::integer(all.parse::<i128>().ok()?);
    let places = i128::try_from(fraction.len()).ok()?;
    if value.is_zero() {
        return Some(value);
    }
    value.multiply(Rational::integer(10).power(power.checked_sub(places)?)?)
}

struct Parser {
    tokens: Vec<(Token, Range<usize>)>,
    at: usize,
    depth: usize,
}

/// Parses a formula.
pub(crate) fn parse(text: &str) -> Result<Node, SyntaxError> {
    let mut parser = Parser {
        tokens: tokens(text)?,
        at: 0,
        depth: 0,
    };
    let node = parser.expression(0)?;
    match parser.take() {
        (Token::End, _) => Ok(node),
        (token, span) => wrong(span, format!("{} is not expected here", token.shown())),
    }
}

impl Parser {
    fn peek(&self) -> &Token {
        self.tokens.get(self.at).map_or(&Token::End, |(t, _)| t)
    }

    fn take(&mut self) -> (Token, Range<usize>) {
        let found = self.tokens.get(self.at).cloned();
        let end = self.tokens.last().map_or(0..0, |(_, span)| span.clone());
        self.at += 1;
        found.unwrap_or((Token::End, end))
    }

    fn wants(&mut self, wanted: &Token) -> Result<Range<usize>, SyntaxError> {
        let (token, span) = self.take();
        if token == *wanted {
            Ok(span)
        } else {
            let message = format!("{} is wanted here, not {}", wanted.shown(), token.shown());
            wrong(span, message)
        }
    }

    fn expression(&mut self, least: u8) -> Result<Node, SyntaxError> {
        self.depth += 1;
        if self.depth > DEEPEST {
            let (_, span) = self.take();
            return wrong(span, format!("formulas are nested at most {DEEPEST} deep"));
        }
        let mut left = self.first()?;
        let mut compared = false;
        while let Token::Operator(operator) = *self.peek() {
            let binding = operator.binding();
            if binding < least {
                break;
            }
            let (_, at) = self.take();
            if compared && binding == COMPARISON {
                return wrong(at, "comparisons are joined with 'and'");
            }
            compared = binding == COMPARISON;
            // Powers are taken from the right.
            let right = self.expression(if operator == Operator::Power {
                binding
            } else {
                binding + 1
            })?;
            left = Node {
                span: left.span.start..right.span.end,
                kind: NodeKind::Binary(operator, Box::new(left), Box::new(right)),
            };
        }
        self.depth -= 1;
        Ok(left)
    }

    fn first(&mut self) -> Result<Node, SyntaxError> {
        let (token, span) = self.take();
        let start = span.start;
        let node = match token {
            Token::Number(number) => Node {
                span,
                kind: NodeKind::Number(number),
            },
            Token::Text(text) => Node {
                span,
                kind: NodeKind::Text(text),
            },
            Token::Name(name) => self.named(name, span)?,
            Token::Operator(Operator::Subtract) => {
                let inner = self.expression(SIGN)?;
                return Ok(Node {
                    span: start..inner.span.end,
                    kind: NodeKind::Negate(Box::new(inner)),
                });
            }
            Token::Open => {
                let inner = self.expression(0)?;
                let end = self.wants(&Token::Close)?;
                Node {
                    span: start..end.end,
                    ..inner
                }
            }
            Token::OpenList => {
                let (items, end) = self.list(&Token::CloseList)?;
                Node {
                    span: start..end,
                    kind: NodeKind::List(items),
                }
            }
            Token::End => return wrong(span, "the formula ends where a value is wanted"),
            other => {
                return wrong(span, format!("a value is wanted here, not {}", other.shown()));
            }
        };
        self.indexed(node)
    }

    fn named(&mut self, name: String, span: Range<usize>) -> Result<Node, SyntaxError> {
        let start = span.start;
        Ok(match name.as_str() {
            "true" | "false" => Node {
                span,
                kind: NodeKind::Bool(name == "true"),
            },
            "not" => {
                let inner = self.expression(NOT)?;
                Node {
                    span: start..inner.span.end,
                    kind: NodeKind::Not(Box::new(inner)),
                }
            }
            _ if *self.peek() == Token::Open => {
                self.take();
                let (arguments, end) = self.list(&Token::Close)?;
                Node {
                    span: start..end,
                    kind: NodeKind::Call(name, arguments),
                }
            }
            _ => Node {
                span,
                kind: NodeKind::Name(name),
            },
        })
    }

    fn indexed(&mut self, mut node: Node) -> Result<Node, SyntaxError> {
        while *self.peek() == Token::OpenList {
            self.take();
            let index = self.expression(0)?;
            let end = self.wants(&Token::CloseList)?;
            node = Node {
                span: node.span.start..end.end,
                kind: NodeKind::Index(Box::new(node), Box::new(index)),
            };
        }
        Ok(node)
    }

    /// Values between commas, and where the list ends.
    fn list(&mut self, close: &Token) -> Result<(Vec<Node>, usize), SyntaxError> {
        let mut items = Vec::new();
        if self.peek() == close {
            return Ok((items, self.take().1.end));
        }
        loop {
            items.push(self.expression(0)?);
            if *self.peek() != Token::Comma {
                return Ok((items, self.wants(close)?.end));
            }
            self.take();
        }
    }
}

impl Node {
    /// Its parts, itself first.
    pub(crate) fn each<'n>(&'n self, visit: &mut dyn FnMut(&'n Self)) {
        visit(self);
        match &self.kind {
            NodeKind::Number(_) | NodeKind::Text(_) | NodeKind::Bool(_) | NodeKind::Name(_) => {}
            NodeKind::List(items) | NodeKind::Call(_, items) => {
                items.iter().for_each(|item| item.each(visit));
            }
            NodeKind::Negate(inner) | NodeKind::Not(inner) => inner.each(visit),
            NodeKind::Index(left, right) | NodeKind::Binary(_, left, right) => {
                left.each(visit);
                right.each(visit);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The tree with parentheses everywhere.
    fn shown(node: &Node) -> String {
        let all = |nodes: &[Node]| nodes.iter().map(shown).collect::<Vec<_>>().join(",");
        match &node.kind {
            NodeKind::Number(number) => number.float.to_string(),
            NodeKind::Text(text) => format!("'{text}'"),
            NodeKind::Bool(value) => value.to_string(),
            NodeKind::Name(name) => name.clone(),
            NodeKind::List(items) => format!("[{}]", all(items)),
            NodeKind::Call(name, arguments) => format!("{name}({})", all(arguments)),
            NodeKind::Index(list, index) => format!("{}[{}]", shown(list), shown(index)),
            NodeKind::Negate(inner) => format!("(-{})", shown(inner)),
            NodeKind::Not(inner) => format!("(not {})", shown(inner)),
            NodeKind::Binary(operator, left, right) => {
                format!("({}{}{})", shown(left), operator.symbol(), shown(right))
            }
        }
    }

    fn tree(text: &str) -> String {
        shown(&parse(text).unwrap())
    }

    fn message(text: &str) -> String {
        let error = parse(text).unwrap_err();
        format!("{}: {}", error.span.start, error.message)
    }

    #[test]
    fn operators_bind_as_in_arithmetic() {
        assert_eq!(tree("1 + 2 * 3 - 4 / 5"), "((1+(2*3))-(4/5))");
        assert_eq!(tree("-a^2^b * c"), "((-(a^(2^b)))*c)");
        assert_eq!(tree("not a == b and c or d"), "(((not (a==b))andc)ord)");
        assert_eq!(tree("f(x)[1][-2] // 3 % k"), "((f(x)[1][(-2)]//3)%k)");
        assert_eq!(tree("if(a < 1_000, [1, 2], 2.5e-1)"), "if((a<1000),[1,2],0.25)");
        assert_eq!(tree("(a < b) == (c < d)"), "((a<b)==(c<d))");
    }

    #[test]
    fn numbers_are_kept_exactly() {
        let exact = |text: &str| match parse(text).unwrap().kind {
            NodeKind::Number(number) => number.exact.unwrap().to_string(),
            other => panic!("{other:?}"),
        };
        assert_eq!(exact("0.1"), "1/10");
        assert_eq!(exact("1.50e3"), "1500");
        assert_eq!(exact("0e999"), "0");
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        assert_eq!(message("a + "), "4: the formula ends where a value is wanted");
        assert_eq!(message("a b"), "2: 'b' is not expected here");
        assert_eq!(message("f(a"), "3: ')' is wanted here, not the end");
        assert_eq!(message("a = b"), "2: to compare, write ==");
        assert_eq!(message("a ** b"), "2: a power is written with ^");
        assert_eq!(message("a $ b"), "2: '$' means nothing in a formula");
        assert_eq!(message("'a"), "0: a text without its closing '");
        assert_eq!(message("1 < a < 2"), "6: comparisons are joined with 'and'");
        assert_eq!(message("."), "0: '.' is no number");
        assert!(message(&"(".repeat(100)).contains("nested at most 64 deep"));
        assert!(message(&"1+".repeat(5000)).contains("at most 8192 bytes"));
        assert!(message(&"-".repeat(100)).contains("nested at most 64 deep"));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,60}") {
            let _ = parse(&text);
        }

        #[test]
        fn anything_like_a_formula_is_parsed_or_refused(text in "[a-c0-9.()\\[\\], +*/%^<>=!'\"-]{0,60}") {
            if let Err(error) = parse(&text) {
                prop_assert!(error.span.start <= text.len());
            }
        }

        #[test]
        fn what_is_shown_parses_to_the_same(text in "[a-c1-9]( ?(\\+|-|\\*|/|//|%|\\^) ?[a-c1-9]){0,12}") {
            let once = tree(&text);
            prop_assert_eq!(tree(&once), once);
        }
    }
}
