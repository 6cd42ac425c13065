/*
 * Entry by PVH (Xen's direct boot, also QEMU's -kernel): 32-bit flat protected mode, paging off, EBX = start info.
 * Leaves for 64-bit mode with the first 4 GiB mapped one to one, so that device registers can be reached.
 */
#define PAGE 4096
#define NOTE_PHYS32_ENTRY 18

    .section .note.pvh, "a", @note
    .align 4
    .long 4, 8, NOTE_PHYS32_ENTRY   /* length of name, length of value, type */
    .asciz "Xen"
    .quad pvh_entry

    .section .text.entry, "ax"
    .code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    movl $stack_top, %esp

    /* Nobody promises that memory beyond the file's bytes is zero. */
    movl $bss_start, %edi
    movl $bss_end, %ecx
    subl %edi, %ecx
    shrl $2, %ecx
    xorl %eax, %eax
    rep stosl

    movl $(level3 + 3), level4
    movl $(level2 + 3), %eax
    movl $level3, %edi
    movl $4, %ecx
1:  movl %eax, (%edi)
    addl $PAGE, %eax
    addl $8, %edi
    loop 1b

    movl $0x83, %eax                /* present, writable, 2 MiB */
    movl $level2, %edi
    movl $2048, %ecx
2:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 2b

    movl $0x20, %eax                /* PAE */
    movl %eax, %cr4
    movl $level4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          /* EFER.LME */
    rdmsr
    orl $0x100, %eax
    wrmsr
    lgdt gdt_pointer
    movl $0x80000011, %eax          /* paging, protection, extension type */
    movl %eax, %cr0
    ljmp $8, $long_mode

    .code64
long_mode:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl $stack_top, %esp
    movl %ebx, %edi
    call guest_main
    ud2

    .altmacro
/* One stub per vector that may come: 32 exceptions, 16 lines of the interrupt controllers, 16 between processors. */
    .macro stub vector, has_code
    .align 16
    .if \has_code == 0
    pushq $0
    .endif
    pushq $\vector
    jmp interrupt_common
    .endm

    .globl interrupt_stubs
    .align 16
interrupt_stubs:
    .set vector, 0
    .rept 64
    .if (vector == 8) || (vector == 10) || (vector == 11) || (vector == 12) || (vector == 13) || (vector == 14) || (vector == 17)
    stub %vector, 1
    .else
    stub %vector, 0
    .endif
    .set vector, vector + 1
    .endr
    .align 16

interrupt_common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rbp
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, %rdi
    call on_interrupt
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rbp
    popq %rbx
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq

    .section .rodata
    .align 8
    .globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        /* 8: 64-bit code */
    .quad 0x00cf93000000ffff        /* 16: data */
gdt_pointer:
    .word 23
    .long gdt

    .section .bss
    .align PAGE
    .globl level4
level4: .skip PAGE
level3: .skip PAGE
level2: .skip 4 * PAGE
    .skip 16384
    .globl stack_top
stack_top:

    .section .note.GNU-stack, "", @progbits
