//! Answers to system calls, as a program for the kernel: a search for the call's number, then a look at one argument at most.
//!
//! ```text
//!   number >= 60 ? --- number >= 100 ? --- always this          a tree over the numbers where the answer changes
//!                |                    `--- by an argument: is it this? that? else
//!                `---- ...
//! ```
//! The kernel runs a filter that it is given once for every call there is, to note which are always allowed, and each thread
//! brings its own: so it counts how long programs are, and how long the way to an answer is. In a list that is tried from its
//! beginning both grow with the number of calls.
//!
//! **Invariant:** a program answers each call as its [`Policy`] does, and ends a process that makes one of another kind of machine.

use std::collections::BTreeMap;
use std::iter::once;

use libc::c_long;
use seccompiler::{BpfProgram, SeccompAction, sock_filter};

/// Calls of the 32-bit pointer ABI have this bit; nothing here makes any.
const X32: u32 = 0x4000_0000;

/// What the kernel answers to each call.
#[derive(Debug)]
pub(super) struct Policy {
    answers: BTreeMap<u32, Answer>,
    others: SeccompAction,
}

/// The answer to one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Always(SeccompAction),
    /// What is said of the first case that the lower half of an argument is, or else `otherwise`.
    By {
        argument: u8,
        cases: Vec<(Case, SeccompAction)>,
        otherwise: SeccompAction,
    },
}

/// What an argument can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Case {
    /// This number.
    Is(u32),
    /// A number with none of these bits.
    HasNone(u32),
}

impl Policy {
    /// All calls are answered the same.
    pub(super) fn new(others: SeccompAction) -> Self {
        Self { answers: BTreeMap::new(), others }
    }

    pub(super) fn set(&mut self, call: c_long, answer: Answer) {
        let number = u32::try_from(call).ok().filter(|number| *number < X32);
        self.answers.insert(number.expect("a call of this kind of machine"), answer);
    }

    pub(super) fn set_all<'a>(
        &mut self,
        calls: impl IntoIterator<Item = &'a c_long>,
        action: &SeccompAction,
    ) {
        for call in calls {
            self.set(*call, Answer::Always(action.clone()));
        }
    }

    /// The program that answers so.
    pub(super) fn program(&self) -> BpfProgram {
        let mut program = vec![
            load(ARCHITECTURE),
            jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0),
            answer_with(&SeccompAction::KillProcess),
            load(NUMBER),
        ];
        program.extend(search(&self.changes()));
        program
    }

    /// From which number on which answer is given.
    fn changes(&self) -> Vec<(u32, Answer)> {
        let others = Answer::Always(self.others.clone());
        let after = |number: &u32| (number + 1, others.clone());
        let mut changes: BTreeMap<u32, Answer> = self.answers.keys().map(after).collect();
        changes.extend(once((0, others.clone())));
        changes.extend(once((X32, Answer::Always(SeccompAction::KillProcess))));
        changes.extend(self.answers.iter().map(|(number, answer)| (*number, answer.clone())));
        let mut changes: Vec<_> = changes.into_iter().collect();
        changes.dedup_by(|next, last| next.1 == last.1);
        changes
    }
}

/// Where the kernel shows a filter the call, `linux/seccomp.h`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// `linux/audit.h`.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// With the number at hand, answers as the last change says that begins at it or before.
fn search(changes: &[(u32, Answer)]) -> BpfProgram {
    if let [(_, answer)] = changes {
        return say(answer);
    }
    let (below, from) = changes.split_at(changes.len() / 2);
    let (left, right) = (search(below), search(from));
    let mut program = match u8::try_from(left.len()) {
        Ok(over) => vec![jump(libc::BPF_JGE, from[0].0, over, 0)],
        // A branch reaches no further than 255.
        Err(_) => vec![jump(libc::BPF_JGE, from[0].0, 0, 1), skip(left.len())],
    };
    program.extend(left);
    program.extend(right);
    program
}

fn say(answer: &Answer) -> BpfProgram {
    match answer {
        Answer::Always(action) => vec![answer_with(action)],
        Answer::By { argument, cases, otherwise } => {
            let case = |(case, action): &(Case, SeccompAction)| [is(*case), answer_with(action)];
            let argument = load(ARGUMENTS + 8 * u32::from(*argument));
            once(argument).chain(cases.iter().flat_map(case)).chain(once(answer_with(otherwise))).collect()
        }
    }
}

/// Goes on where it is so, and leaves the next instruction out where it is not.
fn is(case: Case) -> sock_filter {
    match case {
        Case::Is(value) => jump(libc::BPF_JEQ, value, 0, 1),
        Case::HasNone(bits) => jump(libc::BPF_JSET, bits, 1, 0),
    }
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
}

/// Leaves out `then` instructions where the comparison holds, and `otherwise` where not.
fn jump(comparison: u32, value: u32, then: u8, otherwise: u8) -> sock_filter {
    instruction(libc::BPF_JMP | comparison | libc::BPF_K, value, then, otherwise)
}

fn skip(instructions: usize) -> sock_filter {
    let count = u32::try_from(instructions).expect("a program has a few hundred");
    instruction(libc::BPF_JMP | libc::BPF_JA, count, 0, 0)
}

fn answer_with(action: &SeccompAction) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, action.clone().into(), 0, 0)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: u16::try_from(code).expect("codes have 8 bits"), jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A call as a filter sees it; of each argument the lower half.
    #[derive(Clone, Copy, Debug)]
    struct Call {
        number: u32,
        architecture: u32,
        arguments: [u32; 6],
    }

    /// What the kernel does with a program; no loop is possible, as all ways lead forward.
    fn run(program: &[sock_filter], call: Call) -> u32 {
        let mut at = 0;
        let mut value = 0;
        loop {
            let sock_filter { code, jt, jf, k } = program[at].clone();
            at += 1;
            let to = |holds: bool| usize::from(if holds { jt } else { jf });
            match (code & 7, code & 0xf0) {
                (0, _) => {
                    value = match k {
                        NUMBER => call.number,
                        ARCHITECTURE => call.architecture,
                        _ => call.arguments[usize::try_from((k - ARGUMENTS) / 8).expect("small")],
                    };
                }
                (5, 0x00) => at += usize::try_from(k).expect("small"),
                (5, 0x10) => at += to(value == k),
                (5, 0x30) => at += to(value >= k),
                (5, 0x40) => at += to(value & k != 0),
                (6, _) => return k,
                other => panic!("no program has {other:?}"),
            }
        }
    }

    /// The answer as it was given, without a search.
    fn expected(policy: &Policy, call: Call) -> u32 {
        if call.architecture != AUDIT_ARCH_X86_64 || call.number >= X32 {
            return SeccompAction::KillProcess.into();
        }
        let action = match policy.answers.get(&call.number) {
            None => &policy.others,
            Some(Answer::Always(action)) => action,
            Some(Answer::By { argument, cases, otherwise }) => {
                let value = call.arguments[usize::from(*argument)];
                let applies = |case: Case| match case {
                    Case::Is(number) => value == number,
                    Case::HasNone(bits) => value & bits == 0,
                };
                cases.iter().find(|(case, _)| applies(*case)).map_or(otherwise, |(_, action)| action)
            }
        };
        action.clone().into()
    }

    fn check(policy: &Policy, values: &[u32]) {
        let program = policy.program();
        let beyond = [X32 - 1, X32, X32 + 1, X32 + 520, u32::MAX];
        for number in (0..1024).chain(beyond) {
            for architecture in [AUDIT_ARCH_X86_64, 0x4000_0003] {
                for (argument, value) in
                    (0..6).flat_map(|argument| values.iter().map(move |v| (argument, *v)))
                {
                    let mut call = Call { number, architecture, arguments: [!value; 6] };
                    call.arguments[argument] = value;
                    assert_eq!(run(&program, call), expected(policy, call), "{call:?}");
                }
            }
        }
    }

    fn error(number: u32) -> SeccompAction {
        SeccompAction::Errno(number)
    }

    #[test]
    fn a_program_without_answers_has_the_one_for_all() {
        check(&Policy::new(SeccompAction::Trap), &[0]);
    }

    #[test]
    fn each_call_is_answered_as_was_said_at_the_ends_of_ranges_too() {
        let mut policy = Policy::new(SeccompAction::Allow);
        policy.set_all(&[0, 1, 2, 9, 11, 13, 300, 301, 1023], &SeccompAction::Trap);
        policy.set(10, Answer::Always(error(22)));
        check(&policy, &[0, 5]);
    }

    #[test]
    fn an_argument_decides_where_it_was_said_so() {
        let mut policy = Policy::new(SeccompAction::Trap);
        let cases = vec![(Case::Is(7), SeccompAction::Allow), (Case::HasNone(6), error(1))];
        policy.set(4, Answer::By { argument: 5, cases, otherwise: error(2) });
        policy.set(5, Answer::By { argument: 0, cases: Vec::new(), otherwise: error(3) });
        policy.set(6, Answer::Always(SeccompAction::Allow));
        check(&policy, &[0, 1, 2, 6, 7, 8, u32::MAX]);
    }

    #[test]
    fn branches_reach_over_long_programs() {
        let mut policy = Policy::new(SeccompAction::Allow);
        for call in 0..400 {
            policy.set(call, Answer::Always(error(u32::try_from(call).expect("small") + 1)));
        }
        let many = (0..200).map(|value| (Case::Is(value), SeccompAction::Trap)).collect();
        policy.set(3, Answer::By { argument: 2, cases: many, otherwise: SeccompAction::Allow });
        check(&policy, &[0, 199, 200]);
    }

    #[test]
    fn neighbours_with_one_answer_take_no_more_room_than_one() {
        let mut near = Policy::new(SeccompAction::Trap);
        near.set_all(&(20..60).collect::<Vec<_>>(), &SeccompAction::Allow);
        let mut one = Policy::new(SeccompAction::Trap);
        one.set_all(&[20], &SeccompAction::Allow);
        assert_eq!(near.program().len(), one.program().len());
    }
}
